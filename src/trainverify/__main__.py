"""`python -m trainverify`: the command line."""
import sys

from trainverify.cli import main

if __name__ == "__main__":
    sys.exit(main())
