/* A USB camera without the camera: what OpenCV asks of a V4L2 device is answered here.  Loaded by LD_PRELOAD.

     cc -shared -fPIC -pthread -o v4l2_device.so v4l2_device.c

   V4L2_DEVICE is the path that stands for the device.  It shows BGR24 at 640x480 or 320x240 and 15, 30 or 60 fps, red 200,
   green the exposure, blue the frame's number.  While a file of that path + ".stalled" exists it sends nothing; with
   ".frozen" it repeats a picture; with ".unplugged" it is gone.  Frames for which no buffer is queued are lost, as a
   driver loses them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BUFFERS = 4, LARGEST = 640 * 480 * 3, FREE = 0, QUEUED, DONE };

static struct { unsigned char *start; int state; struct timeval stamp; } buffers[BUFFERS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int device = -1, wake = -1, streaming, width = 640, height = 480, fps = 30, exposure = 100, automatic = 3;
static unsigned requested, sequence;

static int said(const char *what) {
    char path[4096];
    snprintf(path, sizeof path, "%s.%s", getenv("V4L2_DEVICE"), what);
    return syscall(SYS_access, path, F_OK) == 0;
}

static void expose(void) {
    static unsigned shown;
    sequence++;
    if (!said("frozen")) shown = sequence;
    for (unsigned i = 0; i < requested; i++)
        if (buffers[i].state == QUEUED && buffers[i].start) {
            for (unsigned char *p = buffers[i].start; p < buffers[i].start + width * height * 3; p += 3)
                p[0] = shown, p[1] = exposure, p[2] = 200;
            struct timespec now;
            clock_gettime(CLOCK_MONOTONIC, &now);
            buffers[i].stamp = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
            buffers[i].state = DONE;
            (void)!write(wake, "", 1);
            return;
        }
}

/* The sensor, until the device is unplugged or closed: then whoever polls it is woken. */
static void *run(void *unused) {
    while (1) {
        usleep(1000000 / fps);
        pthread_mutex_lock(&lock);
        if (device < 0 || said("unplugged")) {
            syscall(SYS_close, wake);
            wake = -1;
            pthread_mutex_unlock(&lock);
            return unused;
        }
        if (streaming && !said("stalled")) expose();
        pthread_mutex_unlock(&lock);
    }
}

static int open_device(void) {
    int ends[2];
    pthread_t sensor;
    if (said("unplugged")) return errno = ENODEV, -1;
    while (__atomic_load_n(&wake, __ATOMIC_SEQ_CST) >= 0) usleep(1000);
    if (pipe2(ends, O_NONBLOCK)) return -1;
    device = ends[0], wake = ends[1], streaming = requested = sequence = 0, fps = 30;
    pthread_create(&sensor, NULL, run, NULL);
    pthread_detach(sensor);
    return device;
}

static int control(unsigned id, int *value, int set) {
    int *held = id == V4L2_CID_EXPOSURE_ABSOLUTE ? &exposure : id == V4L2_CID_EXPOSURE_AUTO ? &automatic : NULL;
    if (!held) return errno = EINVAL, -1;
    if (set && held == &exposure && automatic != V4L2_EXPOSURE_MANUAL) return errno = EACCES, -1;
    if (set) *held = held == &exposure && *value > 200 ? 200 : *value;
    *value = *held;
    return 0;
}

static int dequeue(struct v4l2_buffer *buffer) {
    char byte;
    if (wake < 0) return errno = ENODEV, -1;
    if (read(device, &byte, 1) != 1) return errno = EAGAIN, -1;
    for (unsigned i = 0; i < requested; i++)
        if (buffers[i].state == DONE) {
            buffers[i].state = FREE;
            buffer->index = i, buffer->timestamp = buffers[i].stamp, buffer->length = LARGEST;
            buffer->bytesused = width * height * 3;
            return 0;
        }
    return errno = EIO, -1;
}

static int answer(unsigned long request, void *argument) {
    struct v4l2_format *format = argument;
    struct v4l2_streamparm *rate = argument;
    struct v4l2_requestbuffers *wanted = argument;
    struct v4l2_buffer *buffer = argument;
    struct v4l2_queryctrl *query = argument;
    struct v4l2_control *setting = argument;
    switch (request) {
    case VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)argument)->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    case VIDIOC_S_FMT:
        if (format->fmt.pix.pixelformat != V4L2_PIX_FMT_BGR24) return errno = EINVAL, -1;
        width = format->fmt.pix.width > 480 ? 640 : 320, height = width * 3 / 4; /* falls through */
    case VIDIOC_G_FMT:
        format->fmt.pix.pixelformat = V4L2_PIX_FMT_BGR24;
        format->fmt.pix.width = width, format->fmt.pix.height = height;
        format->fmt.pix.bytesperline = width * 3, format->fmt.pix.sizeimage = width * height * 3;
        return 0;
    case VIDIOC_S_PARM:
        fps = (int)rate->parm.capture.timeperframe.denominator;
        if (fps != 15 && fps != 60) fps = 30; /* falls through */
    case VIDIOC_G_PARM:
        rate->parm.capture.timeperframe = (struct v4l2_fract){1, fps};
        return 0;
    case VIDIOC_QUERYCTRL:
        query->minimum = 1, query->maximum = 200;
        return control(query->id, &(int){0}, 0);
    case VIDIOC_G_CTRL: return control(setting->id, &setting->value, 0);
    case VIDIOC_S_CTRL: return control(setting->id, &setting->value, 1);
    case VIDIOC_REQBUFS:
        if (wanted->count > BUFFERS) wanted->count = BUFFERS;
        requested = wanted->count;
        memset(buffers, 0, sizeof buffers);
        return 0;
    case VIDIOC_QUERYBUF:
        buffer->length = LARGEST, buffer->m.offset = buffer->index << 12;
        return 0;
    case VIDIOC_QBUF:
        if (wake < 0) return errno = ENODEV, -1;
        buffers[buffer->index].state = QUEUED;
        return 0;
    case VIDIOC_DQBUF: return dequeue(buffer);
    case VIDIOC_STREAMON: return streaming = 1, 0;
    case VIDIOC_STREAMOFF: return streaming = 0, 0;
    }
    return errno = ENOTTY, -1;
}

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (fd < 0 || fd != device) return (int)syscall(SYS_ioctl, fd, request, argument);
    pthread_mutex_lock(&lock);
    int result = answer(request, argument);
    pthread_mutex_unlock(&lock);
    return result;
}

int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    const char *ours = getenv("V4L2_DEVICE");
    return ours && !strcmp(path, ours) ? open_device() : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int close(int fd) {
    if (fd >= 0 && fd == device) device = -1;
    return (int)syscall(SYS_close, fd);
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
    if (fd < 0 || fd != device) return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
    void *start = (void *)syscall(SYS_mmap, 0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return buffers[offset >> 12].start = start;
}

int open64(const char *path, int flags, ...) __attribute__((alias("open")));
void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));
