"""`python -m weighted_mtp` is `wmtp`."""

from weighted_mtp.pipelines.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
