"""Times of a training step and of encoding with `HashNet` on the CPU, with contiguous and with channels_last weights.

`python -m benchmarks.networks.memory_format` prints the median of each layout and the ratio of the two medians. The
layouts alternate within each round. Encoding convolves in channels_last even if the weights are contiguous. With
`--threads 1`, the command measures processor time, which other programs on the machine do not increase.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hashengine import methods
from hashengine.methods.base import Batch
from hashengine.models import HashNet, HashNetConfig, memory_format

# Per network: channels of the images, size of the images, stride of the stem, widths of the stages.
CASES = ((1, 28, 2, (32, 64, 128)), (3, 32, 2, (32, 64, 128)), (3, 32, 1, (32, 64, 128)), (3, 32, 1, (8, 16)))
LAYOUTS = ("contiguous", "channels_last")


@contextmanager
def networks_built_with(layout: str) -> Iterator[None]:
    """Within this context, new networks get weights in the given layout, whatever the CPU is."""
    known_problem = memory_format.known_problem
    memory_format.known_problem = lambda **_: "contiguous is wanted" if layout == "contiguous" else None
    try:
        yield
    finally:
        memory_format.known_problem = known_problem


def training_step(config: HashNetConfig, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A function that makes one AdamW step with the loss of greedy hash."""
    network, method = HashNet(config).train(), methods.create("greedy_hash")
    method.add_parameters(config.bits, len(config.classes))
    optimizer = torch.optim.AdamW([*network.parameters(), *method.parameters()], 1e-3)

    def step() -> None:
        terms = method.loss(Batch(*network(images), labels), 0, 1)
        optimizer.zero_grad()
        (terms["classification"] + terms["penalty"]).backward()
        optimizer.step()

    return step


def median_milliseconds(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median time of each call. The calls alternate within each round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(1000 * (clock() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}; medians in ms")
    print("input", "widths", "stem stride", "attention", "pass", *LAYOUTS, "contiguous / channels_last", sep="\t")
    for channels, size, stem_stride, widths in CASES:
        images = torch.randint(0, 256, (arguments.batch, channels, size, size), dtype=torch.uint8)
        labels = torch.randint(0, 10, (arguments.batch,))
        for attention in ("none", "simam", "triplet"):
            config = HashNetConfig(
                classes=tuple("0123456789"), channels=channels, image_size=size, attention=attention,
                stem_stride=stem_stride, widths=widths,
            )  # fmt: skip
            steps, encoders = {}, {}
            for layout in LAYOUTS:
                with networks_built_with(layout):
                    steps[layout] = training_step(config, images, labels)
                    network = HashNet(config).eval()
                encoders[layout] = functools.partial(network.encode, images)
            for name, calls in (("training step", steps), ("encode", encoders)):
                found = median_milliseconds(calls, arguments.rounds, clock)
                ratio = found["contiguous"] / found["channels_last"]
                shape = f"{channels} x {size} x {size}"
                times = (f"{found[layout]:.2f}" for layout in LAYOUTS)
                print(shape, *map(str, (widths, stem_stride)), attention, name, *times, f"{ratio:.2f}", sep="\t")


if __name__ == "__main__":
    main()
