# SPDX-License-Identifier: Apache-2.0
"""Why two recorded runs are different; two records in, a plain value out.

`find` joins what `config`, `keys`, `metrics` and `arrays` find, `causes` says in a
sentence what it comes from, `text` says all of it in tables.
"""
