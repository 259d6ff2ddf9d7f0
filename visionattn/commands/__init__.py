"""The commands of ``visionattn``, a file each: parse, call one function, print one result."""
