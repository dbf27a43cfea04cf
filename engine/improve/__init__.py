"""From what clients sent and said to the next version: is it other than what was learnt, and does learning it help?"""
