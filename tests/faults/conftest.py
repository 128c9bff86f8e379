"""The fault tests drive real runs with the helpers of tests/test_train.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
