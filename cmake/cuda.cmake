# The CUDA kernels: an extension of their own with a static runtime, which loads without a driver. Without nvcc there is
# none, and GPUs run the Triton kernels.
option(LOWBIT_CUDA "Build the CUDA kernels if nvcc is found" ON)
set(LOWBIT_CUDA_ARCHITECTURES "80-real;90-real;90-virtual" CACHE STRING "GPUs that the mma kernels are compiled for")
if(NOT LOWBIT_CUDA)
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "lowbit: nvcc not found, no CUDA kernels are built")
  return()
endif()
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
