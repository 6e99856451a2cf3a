# SPDX-License-Identifier: Apache-2.0
"""Many runs through one compiled program: lanes, and which runs can be lanes."""
