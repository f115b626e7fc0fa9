"""python -m quantkit"""

from quantkit.cli import main

main(prog_name="quantkit")
