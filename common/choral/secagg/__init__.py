"""Secure aggregation: what both sides compute so that the coordinator learns a sum and none of its terms.

Bonawitz et al. 2017 (CCS), the actively secure variant; on many clients a graph in place of everybody with everybody (Bell et al.
2020, CCS). Here is the mathematics, and nothing that waits or talks. In the order in which it is met:

    fixed_point   an update as integers of a ring, whose sum cannot overflow
    wide          a few numbers beside it, in a ring so wide that neither range nor steps matter
    summand       what a client adds to a round's sum: the update, and those numbers by name
    masks         pseudo-random integers that cancel in the sum, and those that are taken off it afterwards
    shamir        a secret in shares, of which so many together give it back
    graph         who shares masks with whom, and how many shares must come together
    keys          agreements, shares under way, commitments
"""
