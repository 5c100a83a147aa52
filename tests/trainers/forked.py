"""Processes forked from one that has imported what trains packs, and has started no thread of torch's yet: each is up
in a moment, where a new interpreter imports for seconds."""

import multiprocessing
from multiprocessing.context import ForkServerContext


def forked() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saescale.trainers.training.train"])
    return context
