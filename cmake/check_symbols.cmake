# Fails if a unit of kernels holds a weak symbol: the linker would keep one copy for all, perhaps the one
# that needs AVX-512. Variables: NM, OBJECTS (semicolon-separated).
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "nm failed on ${object}")
  endif()
  if(symbols MATCHES "[^\n]* [WVuw] [^\n]*")
    message(FATAL_ERROR "weak symbol in ${object}: ${CMAKE_MATCH_0}")
  endif()
endforeach()
