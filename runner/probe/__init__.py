# SPDX-License-Identifier: Apache-2.0
"""`task: probe`: a model that is called with declared arrays."""
