"""Expert parallelism and FSDP2 for one model on many ranks."""

from moe.parallel.apply import ParallelConfig as ParallelConfig
from moe.parallel.apply import by_mesh as by_mesh
from moe.parallel.apply import clip_grad_norm as clip_grad_norm
from moe.parallel.apply import divide_experts as divide_experts
from moe.parallel.apply import materialize as materialize
from moe.parallel.apply import parallelize as parallelize
from moe.parallel.dispatch import AllToAllDispatcher as AllToAllDispatcher
from moe.parallel.hf_io import export as export
from moe.parallel.hf_io import load as load
from moe.parallel.job import Job as Job
from moe.parallel.job import start as start
from moe.parallel.mesh import Mesh as Mesh
from moe.parallel.mesh import make_mesh as make_mesh
from moe.parallel.states import StateWriter as StateWriter
from moe.parallel.states import load_latest as load_latest
from moe.parallel.tensor_parts import part_like as part_like
from moe.parallel.transport import AllToAll as AllToAll
from moe.parallel.transport import Loopback as Loopback
from moe.parallel.transport import Transport as Transport
from moe.planning.placement import Placement as Placement
from moe.planning.placement import place as place
