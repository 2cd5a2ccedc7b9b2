"""python -m gemma_funnel.study: see `runner`."""

from gemma_funnel.study.runner import main

main()
