# SPDX-License-Identifier: Apache-2.0
"""What a traced program draws: each key followed back to where it comes from.

`trace` traces a function and watches Flax while it does; `walk` goes over the jaxpr,
with a file for each kind of equation; `refs` is what is known of a key on the way.
"""
