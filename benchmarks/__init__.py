"""What the ops and the models are measured with, in a checkout: python -m benchmarks.NAME (README.md lists them)."""

from pathlib import Path

__all__ = ["ROOT"]

ROOT = Path(__file__).resolve().parent.parent
