# SPDX-License-Identifier: Apache-2.0
"""The keys of a compiled program as it runs, as extra outputs."""
