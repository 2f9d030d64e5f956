import sys

from featdistill.cli.main import main

sys.exit(main())
