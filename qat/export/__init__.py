"""Exporters: a converted model becomes a file, and a runtime proves that it computes the same.

What all formats share is here: a target's stages (`target`), the manifest beside its file, the proof (`verify`), where
a file goes wrong (`bisect`), and the program that int8 runtimes look for (`int8_program`). A format of several files is
a package, whose `target` is the class that the config names; OpenVINO's and the packed one are a module each.
"""
