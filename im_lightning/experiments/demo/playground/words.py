"""The words of the playground: things with their kinds, names, numbers, verbs; everything lower case and one token."""

from __future__ import annotations

KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("fox", "wolf", "hen", "goat", "horse", "mouse", "bear", "duck", "frog", "sheep", "crow", "snail"),
    "fruit": ("plum", "pear", "fig", "lemon", "cherry", "melon", "grape", "peach", "mango", "apple", "quince", "lime"),
    "tool": ("hammer", "saw", "drill", "rake", "spade", "chisel", "wrench", "plane", "file", "axe", "clamp", "awl"),
    "colour": ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "yellow", "purple", "orange", "teal"),
    "dish": ("soup", "bread", "stew", "cake", "salad", "pie", "rice", "curry", "pasta", "omelette", "toast", "broth"),
}
"""Kind → its things, twelve each."""

THINGS = tuple(thing for things in KINDS.values() for thing in things)
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "henry", "ida", "jonas", "lena", "moritz")
PLACES = ("box", "bag", "cup", "drawer", "basket", "jar", "chest", "tin")
NUMBERS = tuple(str(number) for number in range(41))
VERBS = {"sees": "seen", "finds": "found", "takes": "taken", "hides": "hidden", "draws": "drawn", "brings": "brought"}
"""Verb in the present → its participle."""

ADJECTIVES = ("old", "small", "big", "new", "heavy", "broken")
