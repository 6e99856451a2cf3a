# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the keys of a run, found before step 0.

`find` asks the rules; `places` are the draws that they look at, and `meet` decides
whether two derivations can give one key.
"""
