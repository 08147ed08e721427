"""Pipeline parallelism: a model in parts on the stages of the axis `pipe`.

A step of a model is traced once, as one device would run it on one microbatch (`trace`). The trace
is cut where a layer ends and the next begins (`cut`) into the functions that a schedule speaks of:
forward, backward, and gradient of weights of each part (`parts`). Each stage's program calls its
own of them in the order of the schedule, and sends what the next part needs (`executor`). Around
that are the steps of `fit`, `evaluate` and `predict` (`steps`). See docs/adr/0005.
"""
