"""Installs a lock into the environment that runs this, while an image is built; only the standard library and pip.

python docker/packages.py cpu-serve.lock     # the packages
python docker/packages.py --finish /wheel    # the project, a bill of materials, and away with what only builds
"""

import importlib.metadata
import json
import re
import shutil
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "requirements"))
from install import install_torch_cpu, pip

# What a compiler would want, tests that nobody runs in an image, and OpenMP for accelerators of Intel's.
UNUSED = ["torch/include", "torch/share/cmake", "torch/bin/[!t]*", "torch/bin/test*", "*/tests", "../../*.a", "../../libomptarget*"]
BILL = Path("/opt/tuner/sbom.cdx.json")
# Written when there was nothing yet of what only builds.
DEBIAN = Path("/usr/local/share/debian-packages.txt")


def main() -> int:
    """One of the two."""
    if sys.argv[1] != "--finish":
        lock = Path("requirements") / sys.argv[1]
        if lock.name.startswith("cpu"):
            install_torch_cpu(sys.executable, lock)
        pip(sys.executable, "install", "--no-cache-dir", "--no-deps", "-r", str(lock))
        return 0
    pip(sys.executable, "install", "--no-cache-dir", "--no-deps", *map(str, Path(sys.argv[2]).glob("*.whl")))
    packages = Path(sysconfig.get_paths()["purelib"])
    for place in [place for pattern in UNUSED for place in packages.glob(pattern)]:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    BILL.write_text(json.dumps(bill_of_materials(), indent=1))
    return 0


def bill_of_materials() -> dict[str, object]:
    """What is in the image, in the form of CycloneDX 1.6: Python's packages and Debian's."""
    found = {
        (f"pkg:pypi/{re.sub(r'[-_.]+', '-', each.name).lower()}@{each.version}", each.name, each.version)
        for each in importlib.metadata.distributions()
    }
    for line in DEBIAN.read_text().splitlines():
        name, version, architecture = line.split()
        found.add((f"pkg:deb/debian/{name}@{version}?arch={architecture}", name, version))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "tuner", "version": importlib.metadata.version("tuner")}},
        "components": [
            {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
            for purl, name, version in sorted(found)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
