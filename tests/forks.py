"""Fresh processes without the second that a new interpreter takes to import libraries: forked from one that has them."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_forkserver_preload

from pipeline import processes

LIBRARIES = ["cv2", "numba", "onnx", "onnxruntime", "pipeline.timing", "pipeline.datasets.synthetic"]


def pool(workers):
    """As `processes.pool`."""
    set_forkserver_preload(LIBRARIES)
    return ProcessPoolExecutor(workers, get_context("forkserver"), _begin, (dict(os.environ),))


def _begin(environment):
    os.environ.clear()
    os.environ.update(environment)
    processes._end_with_parent()
