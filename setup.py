"""Packaging of midilite. Run time needs six packages; the tests bring the reference implementations as oracles."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
URL = ""  # where the repository is published, as https://github.com/OWNER/midilite
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "midilite" / "common" / "version.py").read_text().splitlines()
    if "__version__ =" in line
)


def long_description(text: str, url: str) -> str:
    """The README as a package index shows it, which has none of the repository's files beside it.

    Links into the repository become absolute; pictures come from its raw files. Without an address pictures are left
    out and links become their text, so that nothing is broken.
    """

    def link(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        if target.startswith(("http:", "https:", "#")):
            return match.group()
        if not url:
            return "" if picture else label
        return f"{picture}[{label}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


setup(
    name="midilite",
    version=VERSION,
    description="Adapt MIDI-3D and TripoSG (image + mask -> 3D scene) to your own domain with LoRA, in plain PyTorch",
    long_description=long_description((HERE / "README.md").read_text(encoding="utf-8"), URL),
    long_description_content_type="text/markdown",
    **({"url": URL} if URL else {}),
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["midilite", "midilite.*"]),
    package_data={"midilite": ["assets/**/*", "render/page/*", "studio/page/*"]},
    entry_points={"console_scripts": ["midilite = midilite.commands.console:program"]},
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow>=10.0",
        "pyyaml>=6.0",
        "trimesh>=4.0",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff==0.17.6",
            "transformers>=5.0",
            "peft>=0.19",
            "diffusers>=0.36",
            "scikit-image>=0.24",
            "scipy>=1.12",
            "tensorboard>=2.16",
            "playwright>=1.45",  # drives Chromium, which .ci/run installs where it can
            "triton; platform_system == 'Linux'",  # torch's builds for GPUs bring it along; here it interprets kernels
        ],
        "tensorboard": ["tensorboard>=2.16"],
        "hub": ["huggingface_hub>=0.30"],
        "simplify": ["fast-simplification>=0.1.7"],
        "heic": ["pillow-heif>=0.16"],
    },
)
