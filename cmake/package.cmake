# What C++ users get: headers of the torch-free core, and a package for find_package(torch_ext). Both lie in
# the build tree as they will in the installed package folder, so that one config file serves for both.
include(CMakePackageConfigHelpers)

# In this tree headers include each other as "core/grid.h". Such a name is too common for the include path
# of somebody else's program: there it is <torch_ext/core/grid.h>.
file(GLOB_RECURSE headers RELATIVE ${PROJECT_SOURCE_DIR}/csrc CONFIGURE_DEPENDS
  csrc/core/*.h csrc/fake_quant/*.h csrc/observers/*.h)
foreach(header IN LISTS headers ITEMS registry.h)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/${header})
  file(READ csrc/${header} text)
  string(REGEX REPLACE "#include \"([^\"]+)\"" "#include <torch_ext/\\1>" text "${text}")
  file(CONFIGURE OUTPUT include/torch_ext/${header} CONTENT "${text}" @ONLY)
endforeach()

configure_file(cmake/torch_extConfig.cmake.in share/cmake/torch_ext/torch_extConfig.cmake @ONLY)
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/share/cmake/torch_ext/torch_extConfigVersion.cmake COMPATIBILITY SameMinorVersion)

install(DIRECTORY ${PROJECT_BINARY_DIR}/include ${PROJECT_BINARY_DIR}/share DESTINATION .)
