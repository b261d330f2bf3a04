"""Take the pictures of docs/screenshots: python -m tests.web.screenshots."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
