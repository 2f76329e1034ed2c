"""Check params.yaml: `perennial params`."""

from stages.common.params.loading import main

main()
