"""The runs of llmos-benchmark: ours and those of other frameworks, each in a process of its own.

`kinds` lists them and `workload` says what all of them train; neither imports a framework. `ours`,
`keras_tensorflow`, `keras_jax`, `dtensor`, `torch_train` and `torch_pipeline` have ``make(job)``,
which returns a function that takes steps (`timing`). They are imported only by `worker`, in the
process of their run: no framework has to be there for another one's.
"""
