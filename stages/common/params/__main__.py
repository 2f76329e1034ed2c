"""Check params.yaml: `python -m stages.common.params`."""

from stages.common.params.loading import main

main()
