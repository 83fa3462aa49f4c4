"""Writes the teacher's backbone as safetensors, with export.onnx=true as ONNX too, loads it back
and compares.

python jobs/export.py configs/cifar10.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["export"], __doc__)
