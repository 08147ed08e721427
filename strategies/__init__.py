"""Distribution strategies over a mesh of devices."""

if __name__ != "llmos_tf.strategies":
    raise ImportError(
        "This folder is the package llmos_tf.strategies. Install the project "
        "(python3 -m pip install -e .) or start Python in its root, and import llmos_tf.strategies."
    )

from llmos_tf.strategies.data_parallel import DataParallelStrategy
from llmos_tf.strategies.mesh import MeshStrategy
from llmos_tf.strategies.multi_worker import MultiWorkerMeshStrategy
from llmos_tf.strategies.pipeline_parallel import PipelineParallelStrategy
from llmos_tf.strategies.tensor_parallel import TensorParallelStrategy
from llmos_tf.strategies.tpu import TPUMeshStrategy
from llmos_tf.strategies.zero import ZeroStrategy

__all__ = [
    "DataParallelStrategy",
    "MeshStrategy",
    "MultiWorkerMeshStrategy",
    "PipelineParallelStrategy",
    "TPUMeshStrategy",
    "TensorParallelStrategy",
    "ZeroStrategy",
]
