# SPDX-License-Identifier: Apache-2.0
"""Reading and writing what a run leaves behind."""
