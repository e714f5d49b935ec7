# VERSION is the package's, from where its Python files have it: they refuse a module that was built for another.
set(VERSION_FILE ${CMAKE_CURRENT_LIST_DIR}/../speculative_mamba/__init__.py)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${VERSION_FILE})
file(STRINGS ${VERSION_FILE} VERSION REGEX "^__version__ = ")
string(REGEX REPLACE "^.*\"(.*)\"$" "\\1" VERSION "${VERSION}")
