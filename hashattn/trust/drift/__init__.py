"""Drift: does the traffic that a model serves still look like what it was checked on?"""
