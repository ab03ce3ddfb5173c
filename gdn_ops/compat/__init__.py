"""Run other libraries' code on gdn_ops: their function names, layouts and models.

`transformers` runs its models on gdn_ops, `fla` has the functions of flash-linear-attention,
`states` converts states and gates. Nothing here is imported by `import gdn_ops`.
"""
