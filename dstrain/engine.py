"""The only module that says `deepspeed`: joining the ranks, and one engine per stage that steps, saves and loads.

ranks = join_ranks()                      # torchrun, deepspeed, srun, a Ray trial or plain python
engine = Engine(task, optimizer, plan, ranks)
loss_sum, evidence = engine(batch)
engine.backward(loss)                     # once per micro-batch
engine.step(lr_factor)                    # once per micro-batch too; the weights move at the last one
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import math
import os
import re
import resource
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.data.locking import locked
from dstrain.optim import set_lr
from dstrain.partitions import MASTER, Whole, files_by_rank, put_together
from dstrain.schema import UserError
from dstrain.uncompiled import nothing_compiled, put_off_the_compiler

# ------------------------------------------------------------------------------------------------- the ranks


@dataclass(frozen=True)
class Place:
    """Who this process is among its peers, before any of them was met."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    launcher: str


def find_place(environ: Mapping[str, str]) -> Place:
    """Reads the launcher's variables: RANK (deepspeed, torchrun, a Ray trial), a step of srun, or neither.

    A process inside `sbatch` that srun did not start is one rank, whatever the job's size: only a step has
    SLURM_STEP_NUM_TASKS.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Place(
            int(environ["RANK"]),
            int(environ["WORLD_SIZE"]),
            int(environ.get("LOCAL_RANK", "0")),
            environ.get("MASTER_ADDR", "127.0.0.1"),
            int(environ.get("MASTER_PORT", "29500")),
            _launcher(environ),
        )
    if int(environ.get("SLURM_STEP_NUM_TASKS", "0")) > 1:
        job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
        return Place(
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_STEP_NUM_TASKS"]),
            int(environ["SLURM_LOCALID"]),
            environ.get("MASTER_ADDR") or _first_host(environ),
            int(environ.get("MASTER_PORT") or 20_000 + (job * 7 + step) % 20_000),  # every rank derives the same port
            "srun",
        )
    return Place(0, 1, 0, "127.0.0.1", 0, "plain python")


def _launcher(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return environ.get("DSTRAIN_LAUNCHER", "deepspeed" if "CROSS_RANK" in environ else "RANK variables")


def _first_host(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]


def local_size(environ: Mapping[str, str]) -> int:
    """How many ranks the launcher has on this machine, as far as it says so: torchrun, deepspeed, srun."""
    said = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return int(re.split(r"\D", said)[0] or 1)  # srun's `4(x2),3` may list several machines


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of this machine's address `host` on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, seen from one of them."""

    rank: int
    world: int
    device: torch.device
    launcher: str
    hosts: Any = None
    """The process group in which the hosts talk without waiting for their devices; None where there is one rank."""

    def add(self, *numbers: float) -> tuple[float, ...]:
        """Sums over the ranks of numbers that each host knows; no device is waited for."""
        if self.world == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=self.hosts)
        return tuple(sums.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (plain data), on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, json.dumps(value), group=self.hosts)
        return [json.loads(text) for text in found]

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over the ranks, in place; every rank has the same afterwards."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def agree(self, value: Any) -> Any:
        """Rank 0's value (plain data) on every rank; no device is waited for."""
        if self.world == 1:
            return value
        holder = [json.dumps(value)]
        torch.distributed.broadcast_object_list(holder, group=self.hosts)
        return json.loads(holder[0])

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """`with ranks.first() as mine: if mine: ...`: rank 0 works, the others wait; its UserError is raised on all."""
        problem = None
        try:
            yield self.rank == 0
        except UserError as error:
            problem = str(error)
        problem = self.agree(problem)
        if problem is not None:
            raise UserError(problem)

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """`with ranks.alike(): ...`: what every rank does by itself; the UserError of any of them is raised on all."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        problems = self.gather(problem)
        first = next((rank for rank, found in enumerate(problems) if found is not None), None)
        if first is not None:
            raise UserError(f"on rank {first}: {problems[first]}" if first else problems[0])


_PATIENCE = timedelta(days=1)
"""How long a host waits for what another has to say: the first one may have hours of text to tokenise. That it has died is
told by its connection."""


def join_ranks(timeout_minutes: float = 30.0, listener: socket.socket | None = None) -> Ranks:
    """Meets the other ranks (NCCL on GPUs, gloo on CPUs) and picks this rank's device.

    `timeout_minutes`: how long ranks wait for one that does not come, and devices for each other.
    `listener`: where rank 0 listens for the others, if that is open already; nobody can take its port any more.
    Raises UserError when there are more ranks on this machine than GPUs.
    """
    place = find_place(os.environ)
    if place.world == 1:  # nobody is to be met there, but what DeepSpeed shares among ranks is named after it
        place = replace(place, port=free_port())
    cuda = torch.cuda.is_available()
    ranks_here = max(place.local_rank + 1, local_size(os.environ))
    if cuda and ranks_here > torch.cuda.device_count():  # the same on every rank here, so that the first one tells
        raise UserError(
            f"{ranks_here} ranks on this machine, which shows {torch.cuda.device_count()} GPU(s); "
            "start as many ranks as there are GPUs, or look at CUDA_VISIBLE_DEVICES"
        )
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed guesses, and says so
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address, MASTER_PORT=str(place.port),
    )  # fmt: skip
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        deepspeed = import_deepspeed()
        _load_op(says_that_it_waits=place.local_rank == 0)
        shared_memory = _shared_memory(place)
        shared_memory.unlink(missing_ok=True)  # a killed run's, in which the others would look for this rank's sums
        backend, timeout = "nccl" if cuda else "gloo", timedelta(minutes=timeout_minutes)
        with _silence():
            if (store := _own_store(place, listener, timeout)) is not None:  # DeepSpeed takes the group that it finds
                torch.distributed.init_process_group(
                    backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
                )
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        if shared_memory.exists():
            torch.distributed.barrier()  # by then every rank has opened it, and needs no name
            shared_memory.unlink(missing_ok=True)
    hosts = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if place.world > 1 else None
    return Ranks(place.rank, place.world, device, place.launcher, hosts)


def _own_store(place: Place, listener: socket.socket | None, timeout: timedelta) -> Any:
    """Where the ranks find each other; None where torch is to open the launcher's port itself.

    One rank needs no port, and so never meets another run that was given the same one.
    """
    if place.world == 1:
        return torch.distributed.HashStore()
    if place.launcher != "ray":
        return None
    return torch.distributed.TCPStore(
        place.address, place.port, place.world, is_master=listener is not None, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )  # fmt: skip


def _shared_memory(place: Place) -> Path:
    """Where DeepSpeed's ranks on the CPUs of one machine add up their gradients: 70 MB for each, which it never frees."""
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{place.address}_{place.port}_{place.rank}"
    return Path("/dev/shm") / name


@contextlib.contextmanager
def adding_in_order(wanted: bool) -> Iterator[None]:
    """Inside, torch and cuBLAS take kernels that add up in the same order every time; one that has none is a RuntimeError.

    dstrain's own kernels are all of that kind. On a CPU all kernels are, with the same number of threads.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's documented condition; it looks when it first works
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # only warned, flash attention's backward pass would stay as it is
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def leave_ranks() -> None:
    """Ends the process group, so that the interpreter can exit without complaint and another run may join anew."""
    if torch.distributed.is_initialized():
        import_deepspeed().comm.destroy_process_group()  # torch's own would leave DeepSpeed holding a group that is gone


def import_deepspeed() -> Any:
    """DeepSpeed, imported late (it takes seconds) and with its chatter kept to warnings."""
    # The op is compiled with the ninja of this environment, which is not on PATH when nobody activated it.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    # What it compiles depends on this environment's torch: kept with it, no other environment makes it compile again.
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    put_off_the_compiler()
    # DeepSpeed's autotuner imports all of MLflow when it finds it, for a second and 100 MB that no rank has a use for.
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), nothing_compiled():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.runtime.zero.muon.original_muon  # compiles as it is imported, and every engine imports it
            from deepspeed.runtime import bf16_optimizer
    finally:
        if hidden:
            del sys.modules["mlflow"]
    # Six times an engine it collects garbage, only to tell a log how much memory there is.
    bf16_optimizer.see_memory_usage = lambda *said, **how: None
    # It calls torch's collectives by names that torch renames, and Python would tell so again at every step.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def preload() -> None:
    """Imports all that an engine will need, so that processes forked from here have it: seconds of a run's start.

    Starts no thread and wakes no GPU; neither would survive the fork.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks the driver's library what GPUs there are, and not CUDA
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a child that needs the compiler starts no workers for it
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import_deepspeed()
    for name in _IMPORTED_LATE:
        with contextlib.suppress(ImportError):  # other versions have other ones
            importlib.import_module(name)


_IMPORTED_LATE = (
    "deepspeed.module_inject.auto_ep_config", "deepspeed.module_inject.auto_ep_layer", "deepspeed.utils.pin_memory",
    "dstrain.lifeline", "safetensors.torch", "tokenizers", "torch.utils.cpp_extension", "torch.utils.serialization",
)  # fmt: skip
"""What a start comes to need after `import deepspeed`: .7 s, of which setuptools under cpp_extension is most."""


def _load_op(says_that_it_waits: bool) -> None:
    """Loads DeepSpeed's communication op for CPUs, which the first start on a machine compiles.

    torch marks a build by a file. A build that is killed leaves it there, and every later one waits for it to go, for ever
    and without a word. So starts come here one at a time, by a lock that dies with its holder: who has it takes away
    what a dead one has left.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or builder.name in builder._loaded_ops:  # on a GPU; in a process that has met ranks before
        return

    def waiting() -> None:
        if says_that_it_waits:
            print(f"waiting for another process that compiles DeepSpeed's op in {folder}", file=sys.stderr, flush=True)

    folder = Path(_get_build_directory(builder.name, verbose=False))
    if not os.access(next(there for there in (folder, *folder.parents) if there.exists()), os.W_OK):
        raise UserError(f"{folder}: DeepSpeed's op cannot be compiled there; set TORCH_EXTENSIONS_DIR to a folder that can")
    with locked(folder.with_name(f"{folder.name}.lock"), waiting):
        (folder / "lock").unlink(missing_ok=True)
        with _silence():
            build_shm_op()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed prints to standard output; what is worth knowing of it, dstrain says itself."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ------------------------------------------------------------------------------------------------ the engine


_SCALING = {"loss_scaler", "dynamic_loss_scale", "overflow"}
_ENGINE_FOLDER = "engine"
"""DeepSpeed's part of a checkpoint."""


class Diverged(Exception):
    """The loss or a gradient is no longer a number, and nothing heals it."""


class NotFinite(Exception):
    """A step's loss or gradient is not finite. All ranks know it, no weight has moved, and the gradients are gone."""


class Engine:
    """A DeepSpeed engine around one stage's task. It lives as long as the stage; no other run ever uses it again."""

    def __init__(self, task: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any], ranks: Ranks) -> None:
        """`plan` is what `ds_plan.resolve` returned; `task(batch)` returns (loss_sum, evidence)."""
        deepspeed = import_deepspeed()
        self.ranks = ranks
        with _silence():
            self._ds, *_ = deepspeed.initialize(model=task.to(ranks.device), optimizer=optimizer, config=plan)
        self._files = _keep_files(self._ds)
        self._stage = plan["zero_optimization"]["stage"]
        self._norm: Tensor | float = float("nan")
        self._micro_batches = plan["gradient_accumulation_steps"]
        self._done = 0
        scaling = plan["fp16"] if plan.get("fp16", {}).get("enabled") and not plan["fp16"].get("loss_scale") else None
        self._smallest_scale = float(scaling.get("min_loss_scale", 1)) if scaling else math.inf
        self._shared = False
        self._loss_sum = torch.zeros((), device=ranks.device)
        """Of this rank's micro-batches in this step, not scaled."""
        self.gave_out = False
        """Whether `load` has taken over what fp16 could not go on with."""
        self._know_when_shared()
        self._names = [name for name, _ in task.named_parameters()]
        # At stage 0 in bf16 DeepSpeed takes a step with zero gradients to allocate the moments, and AdamW counts it.
        self._begin_anew(lambda group: True)

    @property
    def task(self) -> nn.Module:
        """The module that was given, now in the plan's precision (and partitioned, under ZeRO-3)."""
        return self._ds.module

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Forward pass of one micro-batch: (summed loss () float32, the objective's evidence)."""
        return self._ds(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, which the caller has already divided by the whole step's weight.

        DeepSpeed averages over the ranks, so the loss is multiplied by their number: the ranks' gradients add up to
        the gradient of the global mean. `scale_wrt_gas=False` leaves accumulation to the same arithmetic.
        """
        self._ds.set_gradient_accumulation_boundary(self._done + 1 == self._micro_batches)
        self._loss_sum += loss.detach()
        # 0 times a loss that is not finite is nan: then the gradient is not finite either, and one look at its norm,
        # which the ranks have in common, tells both.
        self._ds.backward(loss * (self.ranks.world + 0.0 * loss.detach()), scale_wrt_gas=False)

    def expect(self, micro_batches: int) -> None:
        """The next step is made of so many micro-batches, the same number on every rank; asked for before its first."""
        assert self._done == 0, "a step has begun"
        self._micro_batches, self._shared = micro_batches, False

    def step(self, lr: float) -> None:
        """Counts a micro-batch; at a step's last one clips, updates with learning rate `lr` and zeroes gradients.

        Raises NotFinite when there is nothing finite to update with, unless a smaller loss scale mends it (fp16).
        """
        self._done += 1
        if self._done < self._micro_batches:
            self._ds.step()
            return
        self._done = 0
        set_lr(self._ds.optimizer, lr)
        scale, skipped, scaling = self._let_the_scale_rest(), self.skipped_steps, dict(self._scaling)
        loss_sum, self._loss_sum = self._loss_sum, torch.zeros_like(self._loss_sum)
        if self._plain and not self._norm_is_finite():
            self._ds.zero_grad()
            raise NotFinite
        self._ds.step()
        if self.skipped_steps == skipped:
            return
        self._forget_sums()
        # A loss is not scaled: no scale was to blame for one that is no number. Only its own rank knows, and all have
        # lowered theirs.
        spoilt = math.isfinite(self._smallest_scale) and any(self.ranks.add(not math.isfinite(loss_sum)))
        if spoilt:
            self._scaling.update(scaling)
        if spoilt or not scale > self._smallest_scale:
            self._ds.skipped_steps = skipped  # whoever hears of it counts it
            raise NotFinite

    @property
    def _scaling(self) -> dict[str, Any]:
        """The state of the loss scaler."""
        wrapper = self._ds.optimizer
        scaler = getattr(wrapper, "loss_scaler", getattr(wrapper, "loss_scale_config", None))
        return vars(scaler) if scaler else {}

    @property
    def _plain(self) -> bool:
        """Whether DeepSpeed leaves the optimizer as it is (stage 0 in fp32): it neither looks at the norm nor tells it."""
        return self._ds.optimizer is self._ds.basic_optimizer

    def _norm_is_finite(self) -> bool:
        gradients = [parameter.grad for parameter in self._ds.module.parameters() if parameter.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return bool(torch.isfinite(self._norm))  # other stages wait for the device here inside DeepSpeed

    def _let_the_scale_rest(self) -> float:
        """The loss scale of this step; at its minimum DeepSpeed's scaler would raise with the gradients still there."""
        scaler = getattr(self._ds.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False
        return self.loss_scale

    def _know_when_shared(self) -> None:
        """Notes when a step's gradients begin to go to the other ranks: from there on no rank can begin anew alone."""
        share = self._ds._backward_epilogue

        def noted() -> None:
            self._shared = self._done + 1 == self._micro_batches
            share()

        self._ds._backward_epilogue = noted

    @property
    def can_forgo(self) -> bool:
        """Whether this rank may give up the step that it is in without the others waiting for it (see `forgo`)."""
        overlapping = bool(getattr(self._ds.optimizer, "overlap_comm", False))
        return self._stage < 2 and not overlapping and not self._shared

    def forgo(self, batch: Any) -> None:
        """Ends a step that this rank cannot finish: nothing moves, on any rank. Always raises NotFinite.

        Up to stage 1 the ranks meet only once, after a step's last micro-batch. There this rank puts in the gradient of
        any small `batch`, made not a number, and the others learn of it as of any such gradient.
        """
        self._drop_gradients()
        self._done = self._micro_batches - 1
        self.spoil(batch)

    def spoil(self, batch: Any) -> None:
        """Takes `batch` as the step's last micro-batch and makes the step one that moves nothing. Raises NotFinite."""
        scaling = dict(self._scaling)
        loss, _ = self(batch)
        if self._stage < 3:  # whose parameters are whole: a batch that asks for no words has no gradient to spoil
            loss = loss + next(parameter for parameter in self.task.parameters() if parameter.requires_grad).sum()
        self.backward(loss * math.nan)
        try:
            self.step(0.0)
        finally:
            self._scaling.update(scaling)  # no overflow has been seen
        raise AssertionError("a spoilt step was taken")

    def _forget_sums(self) -> None:
        """With an offloaded optimizer DeepSpeed would add the next steps to the sums of one that it has skipped."""
        optimizer = self._ds.optimizer
        if hasattr(optimizer, "all_grad_tensors"):
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
            optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)

    def _drop_gradients(self) -> None:
        """Forgets what a step has summed up so far, wherever in it an error struck."""
        optimizer = self._ds.optimizer
        self._ds.zero_grad()
        if self._plain:
            return
        optimizer.zero_grad()
        self._forget_sums()
        if self._stage == 1 and hasattr(optimizer, "ipg_buckets"):
            for bucket in optimizer.ipg_buckets.values():
                bucket.clear()
            optimizer._release_ipg_buffers()
            optimizer.micro_step_id = -1
        if hasattr(optimizer, "_backward_hook_state"):
            optimizer._backward_hook_state.backward_active_depth = 0
            optimizer._backward_hook_state.reset_for_new_step()

    def set_group_scale(self, name: str, scale: float) -> None:
        """Multiplies the learning rate of the parameter groups called `name` (0 holds them still)."""
        for group in self._ds.optimizer.param_groups:
            if group.get("name") == name:
                group["lr_scale"] = scale

    def restart_moments(self, name: str) -> None:
        """Makes AdamW begin anew, moments and step count, for the groups called `name`.

        ZeRO keeps one flat state for a whole group and counts its steps even while every gradient is zero. Without
        this the bias correction would be missing, and a thawed layer's first updates three times too large. Moments
        are there too when a frozen table served as tied output weights.
        """
        self._begin_anew(lambda group: group.get("name") == name)

    def _begin_anew(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        wrapper = self._ds.optimizer
        inner = getattr(wrapper, "optimizer", wrapper)
        if self._stage == 3:
            group_of = wrapper.sub_group_to_group_id
            masters = [
                master
                for number, master in enumerate(wrapper.fp32_partitioned_groups_flat)
                if wanted(inner.param_groups[group_of[number]])
            ]
        else:
            masters = [master for group in inner.param_groups if wanted(group) for master in group["params"]]
        for master in masters:
            for key, value in inner.state.get(master, {}).items():
                if isinstance(value, Tensor):
                    value.zero_()
                else:
                    inner.state[master][key] = 0

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        norm = self._ds.get_global_grad_norm()
        return float(self._norm if norm is None else norm)

    @property
    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 in other precisions."""
        return float(getattr(self._ds.optimizer, "cur_scale", 1.0) or 1.0)

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient overflowed, for which fp16 then lowered its loss scale."""
        return int(self._ds.skipped_steps)

    def weights(self) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU, by the task's own names: the optimizer's master copies where there are any.

        Collective: every rank calls it (ZeRO-3 gathers), every rank gets it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, Tensor] = {}
        masters = self._unlinked_masters()
        for name, parameter in self._ds.module.named_parameters():
            full = masters.get(parameter, safe_get_full_fp32_param(parameter))
            full = parameter if full is None else full
            state[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, buffer in self._ds.module.named_buffers():
            if name in self._persistent_buffers():
                state[name] = buffer.detach().to("cpu", copy=True).contiguous()
        return state

    def _unlinked_masters(self) -> dict[Tensor, Tensor]:
        """By parameter: the fp32 copies at stage 0 in 16 bits, which DeepSpeed does not link to the parameters."""
        wrapper = self._ds.optimizer
        low, high = getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", [])
        pairs = (pair for group in zip(low, high, strict=False) for pair in zip(*group, strict=True))
        return dict(pairs)

    def _persistent_buffers(self) -> set[str]:
        # state_dict() leaves out non-persistent buffers; it is cheap here because it only makes views
        return set(self._ds.module.state_dict()) - set(self._names)

    def snapshot(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy in memory of everything a resume needs: by file name, what this rank's files are to hold. Collective."""
        self._files.clear()
        client_state = {"progress": json.dumps(state)}  # as text: a JSON number comes back bit for bit
        self._ds.save_checkpoint(_ENGINE_FOLDER, tag=_ENGINE_FOLDER, client_state=client_state, save_latest=False)
        files = {f"{_ENGINE_FOLDER}/{Path(path).name}": content for path, content in self._files.items()}
        self._files.clear()  # whoever writes them frees them
        return files

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores the files of a snapshot and returns its state. Collective. Raises UserError when they can't be read.

        They may be those of another number of ranks, and of fp16 where this engine is not in fp16, or the reverse.
        """
        with self.ranks.alike(), _readable(folder):  # before the ranks meet in the middle of it
            model, states = self._read(folder)
        with _readable(folder), _silence():
            return dict(json.loads(self._restore(folder, model, states)["progress"]))

    def _read(self, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(rank 0's file of the model, the optimizer's state of every rank), as far as they are looked at."""
        model, *_ = self._load_files(folder, "*model_states.pt")
        return model, [file["optimizer_state_dict"] for file in self._load_files(folder, "*optim_states.pt")]

    def _load_files(self, folder: Path, pattern: str) -> list[dict[str, Any]]:
        files = files_by_rank(folder / _ENGINE_FOLDER, pattern).values()
        return [self._ds.checkpoint_engine.load(str(file), "cpu", mmap=True) for file in files]

    def _restore(self, folder: Path, model: dict[str, Any], states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns what DeepSpeed keeps for its client."""
        was, now = _in_fp16(model["ds_config"]), _in_fp16(self._ds.config)
        self.gave_out = was and not now
        # At stage 0 there are no states, and ranks are alike.
        if states and (was != now or len(states) != self.ranks.world):
            return self._share_out(model, states, with_scale=was == now)
        return self._ds.load_checkpoint(str(folder), tag=_ENGINE_FOLDER, load_module_strict=True)[1]

    def _share_out(
        self, model: dict[str, Any], states: Sequence[dict[str, Any]], with_scale: bool
    ) -> dict[str, Any]:
        """Takes over what another number of ranks or another precision wrote: every parameter is put together, and this
        rank's share cut."""
        ds, wrapper = self._ds, self._ds.optimizer
        if self._stage == 3:
            wrapper.checkpoint_event_prologue()
        buffers = dict(ds.module.named_buffers())
        with torch.no_grad():
            for name in model["buffer_names"]:
                buffers[name].copy_(model["module"][name])
            self._pour(put_together(model, states))
        # DeepSpeed reads back its own state: what depends on the masters follows them
        scaling = {name: states[0][name] for name in _SCALING & states[0].keys() if with_scale}
        wrapper.load_state_dict({self.ranks.rank: wrapper.state_dict() | scaling}, load_from_fp32_weights=True)
        if self._stage == 3:
            wrapper.checkpoint_event_epilogue()
        else:
            wrapper.update_lp_params()
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(ds, name, model[name])
        return model

    def _pour(self, wholes: dict[str, Whole]) -> None:
        """Fills this rank's flat masters and moments."""
        wrapper, names = self._ds.optimizer, self._ds.param_names
        if self._stage == 3:
            flats = zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
        else:  # stage 1 in bf16 is another class of DeepSpeed's
            masters = [master for group in wrapper.optimizer.param_groups for master in group["params"]]
            low = wrapper.bf16_groups if hasattr(wrapper, "bf16_groups") else wrapper.bit16_groups
            flats = zip(masters, low, strict=True)
        for flat, parameters in flats:
            state = wrapper.optimizer.state[flat]
            end = 0
            for parameter in parameters:
                if self._stage == 3:  # an equal share of each parameter, one after the other
                    length = parameter.ds_tensor.numel()
                    begin, offset = end, self.ranks.rank * length
                    end += length
                elif (place := parameter._hp_mapping) is None:  # all of it lies with other ranks
                    continue
                else:
                    begin, length = place.hp_fragment_address.start, place.hp_fragment_address.numel
                    offset = place.lp_fragment_address.start
                whole = wholes[names[parameter]]
                for key, full in whole.states.items():
                    target = flat if key == MASTER else state.setdefault(key, torch.zeros_like(flat, requires_grad=False))
                    piece = full.flatten()[offset : offset + length]  # the last share of stage 3 is padded
                    target[begin : begin + len(piece)].copy_(piece)
                state |= {key: copy.deepcopy(count) for key, count in whole.counts.items()}

    def close(self) -> None:
        """Frees the optimizer's hooks and buffers."""
        self._ds.destroy()


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Whatever goes wrong in reading is said of the checkpoint."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{checkpoint}: this checkpoint cannot be read ({str(error) or type(error).__name__}); "
            "remove the folder to train its stage anew"
        ) from error


def _in_fp16(plan: Mapping[str, Any]) -> bool:
    return bool(plan.get("fp16", {}).get("enabled"))


def _keep_files(ds: Any) -> dict[str, Any]:
    """Has DeepSpeed put what it would write into the dictionary returned, and read with an allow-list.

    The one, so that training goes on while somebody else writes; the other because a checkpoint may be somebody else's.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, tensor_fragment]
    )
    files: dict[str, Any] = {}

    class Keeping(type(ds.checkpoint_engine)):  # type: ignore[misc]
        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """Nothing is written here."""

        def save(self, state_dict: Any, path: str) -> None:
            files[path] = host_copy(state_dict)

        def load(self, path: str, map_location: Any = None, mmap: bool = False) -> Any:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)

    ds.checkpoint_engine.__class__ = Keeping
    ds._copy_recovery_script = lambda folder: None  # a script that unpickles
    return files


def host_copy(value: Any) -> Any:
    """A deep copy whose tensors lie in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return type(value)((key, host_copy(inner)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_copy(inner) for inner in value)
    return copy.deepcopy(value)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this rank has held, in GB: the GPU allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    # `make setup` calls this: DeepSpeed compiles its communication op on the first start on a machine.
    join_ranks()
    leave_ranks()
    print("DeepSpeed is ready")
