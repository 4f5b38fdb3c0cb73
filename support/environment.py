"""What has to be set before TensorFlow, Keras and matplotlib are imported: each script's first import.

A notebook that imports `modules` keeps its own environment."""

import os
import subprocess
import sys

if sys.platform == "win32":
    sys.exit("This code runs on Linux, macOS and WSL2, not on Windows itself; see README.")

# Closed streams are opened on /dev/null, each under its own number: else a file gets it.
for number, stream in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, stream) is None:
        setattr(sys, stream, open(os.devnull, "w" if number else "r"))

# What TensorFlow and Keras read once, when they are imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for name in [name for name in os.environ if name.startswith("KERAS_")]:
    del os.environ[name]
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["KERAS_HOME"] = os.devnull  # no keras.json there: float32 and channels_last, Keras' defaults
os.environ["MPLBACKEND"] = "Agg"  # no display needed; Keras imports pyplot

# TensorFlow 2.21 prints these lines at each import, whatever TF_CPP_MIN_LOG_LEVEL is. The filter is a process
# of its own, so that the last words of an import that crashes pass too.
CHATTER = r"absl::InitializeLog\(\)|oneDNN custom operations are on|Could not find cuda drivers"
stderr = os.dup(2)
with subprocess.Popen(["grep", "-vE", CHATTER], stdin=subprocess.PIPE, stdout=stderr) as grep:
    os.dup2(grep.stdin.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
