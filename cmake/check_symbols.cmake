# Fails if an instruction set's object holds a weak symbol: the linker would keep one copy for all, perhaps the one
# that needs AVX-512. Variables: NM, OBJECTS (semicolon-separated).
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "/cpu/(scalar|avx)[a-z0-9_]*\\.cpp")
    continue()
  endif()
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "nm failed on ${object}")
  endif()
  if(symbols MATCHES "[^\n]* [WVuw] [^\n]*")
    message(FATAL_ERROR "weak symbol in ${object}: ${CMAKE_MATCH_0}")
  endif()
endforeach()
