"""Pipeline schedules as plain data; defined in `llmos_tf.planning.schedules`."""

from llmos_tf.planning.schedules import SCHEDULES, Op, Schedule, make_schedule

__all__ = ["SCHEDULES", "Op", "Schedule", "make_schedule"]
