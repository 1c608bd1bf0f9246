"""What cases are made of, by which the benchmark checks and times the ops.

An op is benchmarked if its folder has a module `case` with a function

  make(setting: setting.Setting) -> contract.Case
"""
