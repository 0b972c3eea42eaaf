# Found in the place of CMake's: the program has no Python.
set(Python_FOUND TRUE)
