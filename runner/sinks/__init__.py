# SPDX-License-Identifier: Apache-2.0
"""Where records go. `runner.sinks.base` holds the protocol and `make_sinks`."""
