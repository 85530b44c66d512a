"""Compare the packages' files in a wheel and an sdist with those of the checkout: release_files.py DIST."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# Folder of the checkout -> folder of the wheel.
PLACES = {
    "tpeft_deploy/": "tpeft_deploy/",
    "exporters/": "tpeft_deploy/exporters/",
    "runtime/": "tpeft_deploy/runtime/",
}


def main() -> None:
    dist = Path(sys.argv[1])
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(sdist) as opened:
        in_sdist = {name.partition("/")[2] for name in opened.getnames()}
    listed = subprocess.run(["git", "ls-files", "-z", "--", *PLACES], check=True, text=True, stdout=subprocess.PIPE)
    tracked = [name for name in listed.stdout.split("\0") if Path(name).is_file()]
    missing = []
    for name in tracked:
        folder = name[: name.index("/") + 1]
        if PLACES[folder] + name.removeprefix(folder) not in in_wheel:
            missing.append(f"{name} in the wheel")
        if name not in in_sdist:
            missing.append(f"{name} in the sdist")
    if missing:
        sys.exit(f"files of the checkout are missing: {', '.join(missing)}")
    console = [name for name in tracked if name.startswith("runtime/server/console/static/")]
    print(f"{len(tracked)} files of the checkout are in the wheel and the sdist, {len(console)} of them the console's")


if __name__ == "__main__":
    main()
