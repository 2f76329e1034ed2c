"""How training would scale to more processes: measured computing, and an assumed network.

An update of n processes takes the computing of the largest share of its batch and the exchange. Each exchange
is a ring: of S bytes every process sends S / n to its neighbour, n - 1 times to sum (reduce-scatter) and as
often to spread (all-gather), so an all-reduce takes

    2 (n - 1) (latency + S / (n bandwidth))

Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". The exchange
can overlap with the backward pass; how much of it does depends on the machine. So there are two bounds:
nothing overlaps, and all does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Link:
    """What a process can send to its neighbour, and receive from the other one at the same time.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds until the first byte arrives.
    """

    bandwidth: float
    latency: float


# Assumptions, not measurements: nine tenths of the nominal rate, and usual times of a message with TCP (gloo)
# for Ethernet, and with NCCL for InfiniBand and NVLink.
LINKS = {
    "1 Gbit Ethernet": Link(0.9 * 0.125e9, 100e-6),
    "10 Gbit Ethernet": Link(0.9 * 1.25e9, 50e-6),
    "25 Gbit Ethernet": Link(0.9 * 3.125e9, 50e-6),
    "200 Gbit InfiniBand": Link(0.9 * 25e9, 5e-6),
    "NVLink 4": Link(0.9 * 450e9, 3e-6),
}


def time_all_reduce(size: float, processes: int, link: Link) -> float:
    """Return the seconds in which all processes have the sum of `size` bytes of each."""
    return 2 * time_ring(size, processes, link)


def time_ring(size: float, processes: int, link: Link) -> float:
    """Return the seconds of one round: a reduce-scatter or an all-gather of `size` bytes."""
    return (processes - 1) * (link.latency + size / processes / link.bandwidth)


def time_exchange(
    processes: int, link: Link, gradient_bytes: float, weight_bytes: float = 0.0, groups: int = 1
) -> float:
    """Return the seconds that the processes exchange at each update.

    Args:
        gradient_bytes: of what is trained.
        weight_bytes: of a model that the processes share, which is gathered forward and backward; 0 where
            each has the whole.
        groups: into how many the weights are divided; each group is exchanged by itself.
    """
    if not weight_bytes:
        return time_all_reduce(gradient_bytes, processes, link)
    gathered = 2 * time_ring(weight_bytes / groups, processes, link)
    return groups * (gathered + time_ring(gradient_bytes / groups, processes, link))


def simulate(
    seconds: Mapping[int, float], links: Mapping[str, Link], gradient_bytes: float, **shared: Any
) -> list[dict[str, Any]]:
    """Return the speed-up over one process for each number of processes and each link.

    Args:
        seconds: measured of the computing of an update, by the number of processes that share its batch; that
            of one process must be there.
    """
    rows = []
    for name, link in links.items():
        for processes, computing in sorted(seconds.items()):
            exchange = time_exchange(processes, link, gradient_bytes, **shared)
            rows.append(
                {
                    "link": name,
                    "processes": processes,
                    "computing_s": round(computing, 4),
                    "exchange_s": round(exchange, 4),
                    "speedup": round(seconds[1] / (computing + exchange), 2),
                    "speedup_if_all_overlaps": round(seconds[1] / max(computing, exchange), 2),
                }
            )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the speed-ups as a Markdown table, a line for each link, a column for each number."""
    counts = sorted({row["processes"] for row in rows})
    lines = [f"| link | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(row["link"] for row in rows):
        own = {row["processes"]: row for row in rows if row["link"] == name}
        cells = [f"{own[n]['speedup']:.2f} to {own[n]['speedup_if_all_overlaps']:.2f}" for n in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
