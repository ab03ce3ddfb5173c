"""Find contenders by name: this library's backends and other people's implementations.

What is not installed is a reason, never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gdn_ops.bench.contender import Contender, our_contender
from gdn_ops.bench.peers import cpu, gpu
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.names import unknown


@dataclass(frozen=True)
class Peer:
    """Hold another library's implementation.

    Attributes:
        load: imports it.
        devices: types of the devices that it runs on, "*" for any.
        absent: what a failed import means; None for the package that is missing.
    """

    load: Callable[[], Contender]
    devices: tuple[str, ...] = ("cuda",)
    absent: str | None = None


PEERS = {
    "transformers": Peer(cpu.transformers, ("*",), "package 'transformers' is not usable"),
    "onnxruntime": Peer(cpu.onnxruntime, ("cpu",)),
    "vllm-cpu": Peer(cpu.vllm, ("cpu",)),
    "executorch": Peer(cpu.executorch, ("cpu",)),
    "fla": Peer(gpu.fla),
    "flash_qla": Peer(gpu.flash_qla),
    "flashinfer": Peer(gpu.flashinfer),
}


def check_peers(names: Iterable[str], *devices: str) -> None:
    """Refuse names that are no peers of types of devices.

    Raises:
        SpecError: a name is unknown.
    """
    known = peers_on(*devices)
    for name in names:
        if name not in known:
            raise SpecError(unknown("peer", name, known))


def peers_on(*devices: str) -> tuple[str, ...]:
    """Return the names of the peers of types of devices: "cuda", "cpu", or "*" for any."""
    return tuple(name for name, peer in PEERS.items() if {*devices} & {*peer.devices})


def find_contender(name: str) -> Contender | str:
    """Return the contender of that name, a peer or one of our backends, or why it cannot run.

    Raises:
        SpecError: nothing has that name.
    """
    if name not in PEERS:
        return our_contender(name)
    peer = PEERS[name]
    try:
        return peer.load()
    # Peers ask for the device, for a compiler, for a version while they are imported.
    except Exception as error:
        if isinstance(error, cpu.AbsentError):
            return str(error)
        if isinstance(error, ImportError) and peer.absent is not None:
            return f"{peer.absent}: {error}"
        if isinstance(error, ModuleNotFoundError):
            return f"package {error.name!r} is not installed"
        return f"cannot be imported: {type(error).__name__}: {error}"
