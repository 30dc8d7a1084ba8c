"""`python -m reslt.prepare`: create, fetch, adopt or check the lists of a dataset, or shrink or pack its images.

python -m reslt.prepare own --from PHOTOS --name NAME           your own photos, a folder per class
python -m reslt.prepare own --csv FILE --image-column C --label-column C [C ...] --name NAME
python -m reslt.prepare own --json FILE --data-dir IMAGES --name NAME    annotations in COCO's form
python -m reslt.prepare own --extend NAME --from PHOTOS         add photos and classes; no image changes side
python -m reslt.prepare check NAME [--decode] [--fix-paths]     find problems in lists and images
python -m reslt.prepare shrink NAME --size 256 --output DIR     a copy with small images, for faster training
python -m reslt.prepare pack NAME --output DIR                  all images in a few large files, for slow disks
python -m reslt.prepare imagenet_lt [--from-dir DIR]            published lists (places_lt, inaturalist2018 too)
python -m reslt.prepare cifar100 --imb-factor 0.01              CIFAR-LT through torchvision, the published subset
python -m reslt.prepare cifar100 --imb-factor 0.01 --lists DIR --data-dir DIR    adopt lists and PNGs as they are
python -m reslt.prepare longtail --from IMAGEFOLDER --imb-factor 0.01 --name NAME
python -m reslt.prepare digits_lt                               the embedded digits (created at first use anyway)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reslt.config.command_line import add_import_flag
from reslt.config.imports import load_imports
from reslt.config.places import dataset_folder, default_images_folder, lists_folder
from reslt.core.command import Parser, entry_point
from reslt.core.errors import UserError
from reslt.core.text import one_line
from reslt.data.bad_images import record_command
from reslt.data.datasets import load_dataset, read_info
from reslt.data.lists import SPLITS
from reslt.prepare import own, published, subsets
from reslt.prepare.advice import advise_on
from reslt.prepare.check import check
from reslt.prepare.folder import describe
from reslt.prepare.from_folders import from_folder
from reslt.prepare.from_json import from_json
from reslt.prepare.from_table import from_csv
from reslt.prepare.pack import pack
from reslt.prepare.photos import Photos
from reslt.prepare.shrink import shrink


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with one of its own for each command."""
    parser = Parser(
        prog="python -m reslt.prepare",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    mine = commands.add_parser("own", help="make a dataset of your own photos, from class folders, a table or JSON")
    source = mine.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="folder that contains <class>/, or train/<class>/, val/<class>/, ..., or images and a metadata.csv or "
        "metadata.jsonl",
    )
    source.add_argument(
        "--csv", type=Path, help="table with a header, whose cells are separated by commas, semicolons, tabs or bars"
    )
    source.add_argument(
        "--json", type=Path, help="file in COCO's form (images, annotations, categories), as for iNaturalist"
    )
    for split in ("val", "test"):
        mine.add_argument(f"--{split}-csv", type=Path, help=f"with --csv: separate table of the {split} images")
        mine.add_argument(f"--{split}-json", type=Path, help=f"with --json: separate file of the {split} images")
    mine.add_argument("--image-column", help="with --csv: column of image paths, which may lack the file extension")
    mine.add_argument(
        "--label-column",
        nargs="+",
        action="extend",
        help="with --csv: column of class names, or one column of 0 and 1 per class; with metadata: column of class names "
        "(default: label)",
    )
    mine.add_argument("--split-column", help="with --csv or metadata: column that states train, val or test")
    mine.add_argument(
        "--data-dir",
        type=Path,
        help="with --csv and --json: folder that the paths start from; unset: the folder of the file",
    )
    mine.add_argument("--val-per-class", type=int, help="images per class set aside to choose the epoch (default: 0)")
    mine.add_argument(
        "--test-per-class", type=int, help="images per class set aside to test, at most half of a class (default: 10)"
    )
    mine.add_argument("--seed", type=int, help="seed that decides which new images are set aside (default: 0)")
    mine.add_argument(
        "--no-decode", dest="decode", action="store_false", help="do not decode the images to find unreadable ones"
    )
    mine.add_argument("--workers", type=int, default=16, help="processes that decode, at most one per CPU core")
    target = mine.add_mutually_exclusive_group(required=True)
    target.add_argument("--name", help="name of the new folder under data_lists/")
    target.add_argument(
        "--extend",
        metavar="NAME",
        help="dataset to extend with the new images of the source: known images stay in their lists, classes keep their "
        "indices, and unset flags keep their earlier values",
    )
    mine.add_argument(
        "--overwrite", action="store_true", help="replace the dataset --name; known images stay in their lists"
    )

    checked = commands.add_parser(
        "check", help="find problems in a dataset's lists and images; exit code 1 if there are any"
    )
    checked.add_argument("data", help="name of a folder under data_lists/, or a folder that contains train.txt")
    checked.add_argument(
        "--decode", action="store_true", help="decode every image and record unreadable ones in bad_images.csv"
    )
    checked.add_argument(
        "--near-copies", action="store_true", help="with --decode: also find resized and recompressed copies of images"
    )
    checked.add_argument("--data-dir", type=Path, help="folder that the lists' paths start from (image root)")
    add_import_flag(checked)
    checked.add_argument(
        "--fix-paths",
        action="store_true",
        help="find path rules that fit the images, and write them and the image root to local.yaml",
    )
    checked.add_argument("--workers", type=int, default=16, help="processes that decode, at most one per CPU core")
    checked.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot and the counts")

    smaller = commands.add_parser("shrink", help="copy a dataset with smaller images; exit code 1 if some are bad")
    smaller.add_argument("data", help="name of a folder under data_lists/, or a folder that contains train.txt")
    smaller.add_argument("--size", type=int, required=True, help="maximum length of an image's short side in pixels")
    smaller.add_argument("--output", type=Path, required=True, help="new folder of images, or one to continue")
    smaller.add_argument("--quality", type=int, default=95, help="quality of JPEG, WebP and AVIF files (default: 95)")
    smaller.add_argument("--name", help="name of the new folder under data_lists/; unset: NAME_SIZE")
    smaller.add_argument("--workers", type=int, default=16, help="processes that decode, at most one per CPU core")
    smaller.add_argument("--data-dir", type=Path, help="image root of the dataset")

    packed = commands.add_parser("pack", help="write all images into a few tar files; exit code 1 if some are missing")
    packed.add_argument("data", help="name of a folder under data_lists/, or a folder that contains train.txt")
    packed.add_argument("--output", type=Path, required=True, help="new folder of shards, or one to continue or update")
    packed.add_argument("--lists", nargs="+", choices=SPLITS, help="lists to pack (default: all lists)")
    packed.add_argument("--shard-size", type=int, default=1000, help="size of a shard in megabytes (default: 1000)")
    packed.add_argument("--data-dir", type=Path, help="image root of the dataset")

    for name in published.names():
        listed = commands.add_parser(name, help="fetch published lists and verify them")
        listed.add_argument(
            "--from-dir", type=Path, help="folder with copies of the lists, which are used instead of downloads"
        )

    for name in ("cifar10", "cifar100"):
        cifar = commands.add_parser(
            name,
            help=f"make a long-tailed subset of {name.upper().replace('CIFAR', 'CIFAR-')}, through torchvision or from given lists",
        )
        cifar.add_argument(
            "--imb-factor",
            type=float,
            required=True,
            help="size of the smallest class / size of the largest: 0.01, 0.02, 0.1",
        )
        cifar.add_argument(
            "--source",
            type=Path,
            default=default_images_folder() / "downloads",
            help="folder of torchvision's download",
        )
        cifar.add_argument("--lists", type=Path, help="folder with lists, which are used as they are")
        cifar.add_argument("--data-dir", type=Path, help="with --lists: folder that their paths start from")
    longtail = commands.add_parser("longtail", help="make a long-tailed dataset from class folders")
    longtail.add_argument(
        "--from", dest="source", type=Path, required=True, help="folder with train/<class>/ and test/<class>/"
    )
    longtail.add_argument(
        "--imb-factor", type=float, required=True, help="size of the smallest class / size of the largest"
    )
    longtail.add_argument("--profile", choices=("exp", "step"), default="exp", help="how the class counts decrease")
    longtail.add_argument("--seed", type=int, default=0, help="seed that decides which images are kept")
    longtail.add_argument("--name", required=True, help="name of the new folder under data_lists/")
    commands.add_parser(subsets.EMBEDDED, help="write the embedded digits")

    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError for flags that are out of range or contradict each other."""
    given = create_parser().parse_args(arguments)
    factor = getattr(given, "imb_factor", 1.0)
    if not 0 < factor <= 1:
        raise UserError(f"--imb-factor {factor}: it must be above 0 and at most 1")
    ranges = dict.fromkeys(("val_per_class", "test_per_class", "workers", "seed"), (0, None))
    for name, (least, most) in (ranges | {"size": (1, None), "shard_size": (1, None), "quality": (1, 100)}).items():
        value, flag = getattr(given, name, None), name.replace("_", "-")
        if value is None:
            continue
        if value < least or (most and value > most):
            raise UserError(f"--{flag} {value}: give a whole number from {least}" + f" to {most}" * bool(most))
    if given.command in ("cifar10", "cifar100") and given.data_dir and not given.lists:
        raise UserError("--data-dir belongs to --lists; name the folder of torchvision's copy with --source")
    if given.command == "check" and given.near_copies and not given.decode:
        raise UserError("--near-copies belongs to --decode; add it")
    if given.command == "own":
        if given.overwrite and given.extend:
            raise UserError("--overwrite belongs to --name; drop it, or --extend")
        _check_source_flags(given)
    return given


def _check_source_flags(given: argparse.Namespace) -> None:
    """Raise UserError for flags of `own` that are missing or belong to another source of photos."""
    of_tables = ("val_csv", "test_csv", "image_column")
    belong = {"--csv": of_tables, "--json": ("val_json", "test_json"), "--csv and --json": ("data_dir",)}
    is_given = {"--csv": given.csv, "--json": given.json, "--csv and --json": given.csv or given.json}
    for source, names in belong.items():
        if not is_given[source] and (extra := [name for name in names if getattr(given, name)]):
            raise UserError(f"--{extra[0].replace('_', '-')} belongs to {source}; drop it")
    if given.csv and not (given.image_column and given.label_column):
        raise UserError("--csv requires --image-column and --label-column; add them")
    for column in ("label_column", "split_column"):
        if given.json and getattr(given, column):
            flag = column.replace("_", "-")
            raise UserError(f"--{flag} belongs to --csv, and to metadata files with --from; drop it")
    if given.source and len(given.label_column or []) > 1:
        raise UserError("--label-column: several columns belong to --csv; with --from, name one")
    if given.split_column and (given.val_csv or given.test_csv):
        raise UserError("--split-column belongs to a single table; give it, or --val-csv and --test-csv")


def find_photos(given: argparse.Namespace) -> Photos:
    """`own`: find the photos in the given source."""
    if given.csv:
        files = {"train": given.csv, "val": given.val_csv, "test": given.test_csv}
        files = {split: file for split, file in files.items() if file}
        return from_csv(files, given.image_column, given.label_column, given.split_column, given.data_dir)
    if given.json:
        files = {"train": given.json, "val": given.val_json, "test": given.test_json}
        return from_json({split: file for split, file in files.items() if file}, given.data_dir)
    return from_folder(given.source, given.label_column[0] if given.label_column else None, given.split_column)


def make_own(given: argparse.Namespace) -> None:
    """`own`: create, extend or replace a dataset from photos; print remarks, and a command that trains on it."""
    photos = find_photos(given)
    held_out = {"val": given.val_per_class, "test": given.test_per_class}
    existing = "extend" if given.extend else "overwrite" if given.overwrite else "refuse"
    name = given.extend or given.name
    for remark in own.make_own(photos, name, held_out, given.seed, given.decode, given.workers, existing):
        print(remark)
    folder = lists_folder() / name
    advice = advise_on(load_dataset(str(folder), images_needed=False), read_info(folder).get("defaults") or {})
    print("\n".join([*advice.remarks, describe(folder, advice.flags())]))


def shrink_images(given: argparse.Namespace) -> None:
    """`shrink`: shrink the images, and print a summary. Exit with code 1 if some are bad."""
    done = shrink(given.data, given.size, given.output, given.quality, given.name, given.workers, given.data_dir)
    print("\n".join([*done.remarks, describe(done.folder)]))
    if done.bad:
        print("\n".join(f"PROBLEM  {line}" for line in done.bad))
        print("repair them and run the command again, or train without them: --bad-images skip")
        sys.exit(1)


def pack_images(given: argparse.Namespace) -> None:
    """`pack`: pack the images, and print a summary. Exit with code 1 if some are missing."""
    done = pack(given.data, given.output, given.shard_size, given.lists, given.data_dir)
    print("\n".join([*done.remarks, *(f"PROBLEM  {line}" for line in done.bad)]))
    if done.bad:
        print("they are not in the pack; repair them and run the command again, or record them and train without them:")
        print(f"{record_command(given.data)}, then --bad-images skip")
        sys.exit(1)


def bring_published(name: str, from_dir: Path | None) -> None:
    """Provide a benchmark's lists, and print the next steps."""
    for line in published.prepare(name, from_dir):
        print(line)
    folder = dataset_folder(name)
    if all((folder / f"{item.split}.txt").is_file() for item in published.published_lists(folder)):
        print(f"images: a folder DIR that contains {one_line(read_info(folder).get('layout'))}")
        print(f"check them with: python -m reslt.prepare check {name} --data-dir DIR")
        print(describe(folder, " --data-dir DIR"))


@entry_point
def main(arguments: list[str] | None = None) -> None:
    given = parse_arguments(arguments)
    if given.command == "check":
        load_imports(given.imports or ())
        found = check(
            given.data, given.data_dir, given.decode, given.fix_paths, given.workers, given.output, given.near_copies
        )
        print(found.text())
        sys.exit(1 if found.problems else 0)
    if given.command == "shrink":
        return shrink_images(given)
    if given.command == "pack":
        return pack_images(given)
    if given.command in published.names():
        return bring_published(given.command, given.from_dir)
    if given.command == "own":
        return make_own(given)
    if given.command == "longtail":
        folder, remarks = subsets.make_longtail(given.source, given.imb_factor, given.profile, given.seed, given.name)
        print("\n".join(remarks))
    elif given.command == subsets.EMBEDDED:
        subsets.make_digits()
        folder = dataset_folder(subsets.EMBEDDED)
    elif given.lists:
        folder = subsets.adopt_cifar(given.command, given.imb_factor, given.lists, given.data_dir)
    else:
        folder = subsets.make_cifar(given.command, given.imb_factor, given.source)
    print(describe(folder))


if __name__ == "__main__":
    main()
