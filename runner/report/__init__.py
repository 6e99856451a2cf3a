# SPDX-License-Identifier: Apache-2.0
"""Runs as one page of HTML, and as the same tables for a terminal.

`collect` finds and reads runs, `tables` and `comparison` say what is shown of them,
`charts` draws their curves, `page` puts it all into one file. `sweep_tables`,
`sweep_charts` and `sweep_drawings` do the same for sweeps, as `runner.sweep` read them.
"""
