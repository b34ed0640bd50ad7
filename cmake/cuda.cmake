# The CUDA kernels: an extension of their own with a static runtime, which loads without a driver. Without nvcc there is
# none, and GPUs run the Triton kernels.
set(LOWBIT_CUDA AUTO CACHE STRING "Build the CUDA kernels: ON if nvcc is found, AUTO if a GPU is found too, OFF")
set_property(CACHE LOWBIT_CUDA PROPERTY STRINGS AUTO ON OFF)
set(LOWBIT_CUDA_ARCHITECTURES "80-real;90-real;100-real;120-real;90-virtual" CACHE STRING
  "GPUs that the mma kernels are compiled for; the driver translates the last one for others, which takes seconds")
if(NOT LOWBIT_CUDA)
  message(STATUS "lowbit: no CUDA kernels are built, as LOWBIT_CUDA is ${LOWBIT_CUDA}")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "lowbit: nvcc not found, no CUDA kernels are built")
  return()
endif()
if(LOWBIT_CUDA STREQUAL "AUTO" AND NOT EXISTS /dev/nvidia0)
  execute_process(COMMAND nvidia-smi -L OUTPUT_VARIABLE gpus ERROR_QUIET)
  if(NOT gpus MATCHES "GPU 0")
    message(STATUS "lowbit: nvcc but no GPU found, no CUDA kernels are built; they are with "
      "-DLOWBIT_CUDA=ON (pip: --config-settings=cmake.define.LOWBIT_CUDA=ON)")
    return()
  endif()
endif()
message(STATUS "lowbit: CUDA kernels are built (not with LOWBIT_CUDA=OFF)")
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(STATUS "lowbit: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8, no CUDA kernels are built")
  return()
endif()
find_package(CUDAToolkit REQUIRED)

# wgmma is an instruction of sm_90a alone.
function(lowbit_cuda_objects name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CUDA_ARCHITECTURES "${architectures}"
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(${name} PRIVATE csrc/cuda)
  if(LOWBIT_WERROR)
    target_compile_options(${name} PRIVATE -Werror=all-warnings)
  endif()
endfunction()
lowbit_cuda_objects(lowbit_cuda "${LOWBIT_CUDA_ARCHITECTURES}"
  csrc/cuda/mma_bf16.cu csrc/cuda/mma_f16.cu csrc/cuda/dequantize.cu)
lowbit_cuda_objects(lowbit_cuda_sm90a "90a-real" csrc/cuda/fp8.cu csrc/cuda/wgmma_bf16.cu csrc/cuda/wgmma_f16.cu)

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/bindings.cpp)
target_link_libraries(_cuda PRIVATE lowbit_cuda lowbit_cuda_sm90a CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION lowbit)
