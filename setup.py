"""Computes the list of packages; everything else is in setup.cfg."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

# Folder at the top of the repository -> name of the package it is installed as.
TOP_FOLDERS = {
    "llmos_tf": "llmos_tf",
    "strategies": "llmos_tf.strategies",
    "models": "llmos_tf.models",
    "scripts": "llmos_tf.scripts",
}


def find_packages() -> list[str]:
    """Returns the package of every folder that holds an ``__init__.py``, sorted."""
    packages = []
    for folder, package in TOP_FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            packages.append(".".join((package, *below)))
    return sorted(packages)


# Guarded so that a test can call find_packages without building anything.
if __name__ == "__main__":
    setup(packages=find_packages())
