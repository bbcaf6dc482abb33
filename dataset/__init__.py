"""Where data comes from: the drawn flowers and their probe, importers for the named sets.

Its README says how to lay out your own. Data itself is ignored by git.
"""
